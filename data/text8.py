"""text8: 100 MB of Wikipedia of 2006 in 27 characters, a to z and space.

Matt Mahoney, About the Test Data, 2011. In 2006 Wikipedia was licensed under the GFDL. The splits,
90M, 5M and 5M characters, are those of the papers.
"""

mirrors = ['https://mattmahoney.net/dc/', 'https://data.deepai.org/']
files = {'text8.zip': 'a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232'}
splits = {'train': 0.9, 'val': 0.95, 'test': 1}
