"""Multi30k: 31,000 captions of pictures, from English to French, 4 MB, in splits as published.

Elliott et al., Multi30K: Multilingual English-German Image Descriptions, 2016 [1605.00459]. Its
repository states no licence. No sha256 is published.
"""

mirrors = ['https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/']
files = {f'{split}.{language}.gz': None
         for split in ('train', 'val', 'test_2016_flickr') for language in ('en', 'fr')}
folder = 'multi30k'
layout = 'pairs'
text = {'train': ['train.en', 'train.fr'], 'val': ['val.en', 'val.fr'],
        'test': ['test2016.en|test_2016_flickr.en', 'test2016.fr|test_2016_flickr.fr']}
tokenizer = 'bpe'
vocab_size = 8000
