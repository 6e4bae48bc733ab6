# The autoregressive twin of shakespeare_mdm_10m.py (6 layers, 384 wide, context 256), for a GPU.
# parameters: 10,672,512
#     python train.py config/shakespeare_ar_10m.py     15.8 s per update on 2 CPU cores
# On a GPU and in full: not measured. 250 updates at a constant rate, with --compile=off
# --dropout=0.0 --attn_dropout=0.0 --batch_size=16: nll 1.693 nats/character (data/RESULTS.md, What
# each decoder buys).
dataset = 'shakespeare_char'
objective = 'ar'
n_layer = 6
n_embd = 384
n_conv = 0
batch_size = 64
max_iters = 5000
eval_interval = 250
warmup_iters = 100
dropout = 0.2
attn_dropout = 0.2
weight_decay = 0.1
compile = True
