"""Token sample complexity of attention: the library behind the book.

Each module holds one concept, and its path says of what kind; the page "The library" of the book maps them. Import the
modules, not this package: ``from tokcx_lib.theory import laws, attention``.
"""

__version__ = "0.1.0"
