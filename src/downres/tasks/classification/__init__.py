"""Classification: class folders, top-1, a head that can be fitted anew, photographs with what each candidate says of them."""
