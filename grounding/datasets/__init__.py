"""Data sets of images with captions, boxes or text lines: Flickr30k and others."""
