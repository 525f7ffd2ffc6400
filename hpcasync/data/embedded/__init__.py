"""The data set that ships inside the package: ``digits.h5``, made by ``make_digits.py``."""
