"""CertiPatch inside other libraries: a file for each, which is imported only where that library is used."""
