import warnings
warnings.warn("from the importer", stacklevel=2)
