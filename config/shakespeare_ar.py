# The autoregressive twin of shakespeare_mdm.py: the same network, data and budget.
# parameters: 3,181,824
dataset = 'shakespeare_char'
objective = 'ar'
