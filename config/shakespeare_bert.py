# A masked language model: shakespeare_mdm.py at the one mask rate of BERT [1810.04805], 0.15. Each
# chosen token becomes a mask (BERT leaves a tenth as they are and replaces a tenth by random ones).
# parameters: 1,804,224
#     python train.py config/shakespeare_bert.py       as many updates as shakespeare_mdm.py
# Time and outcome: not measured. Training never shows it a text of which most is masked.
dataset = 'shakespeare_char'
objective = 'mdm'
loss_weight = 'masked_mean'
mask_range = (0.15, 0.15)
