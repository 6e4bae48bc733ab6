# A masked language model: shakespeare_mdm.py at the one mask rate of BERT [1810.04805], 0.15. Each
# chosen token becomes a mask (BERT leaves a tenth as they are and replaces a tenth by random ones).
# parameters: 1,804,224
#     python train.py config/shakespeare_bert.py       as long as shakespeare_mdm.py
# nelbo <= 1.834 nats/character, since it never sees a text of which most is masked; where a quarter
# is, it fills in 76.5%, the MDM 74.0% (data/RESULTS.md, Infilling and correction).
dataset = 'shakespeare_char'
objective = 'mdm'
loss_weight = 'masked_mean'
mask_range = (0.15, 0.15)
