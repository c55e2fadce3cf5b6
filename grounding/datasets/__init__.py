"""Data sets of images with captions, phrases with boxes, or text lines, in the layouts in which they are published."""
