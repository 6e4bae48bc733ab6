# The autoregressive twin of shakespeare_mdm.py: the same network, data and budget.
# parameters: 1,796,544
dataset = 'shakespeare_char'
objective = 'ar'
