"""WikiText-103: 28,000 good articles of Wikipedia, 540 MB, in WikiText-2's format. CC BY-SA 3.0.

Merity et al., Pointer Sentinel Mixture Models, 2016 [1609.07843].
"""

base = 'wikitext2'
files = {'wikitext-103-v1.zip': '242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590'}
