"""The product behind ``tokcx probe``: how many tokens each head of a model needs on a text."""
