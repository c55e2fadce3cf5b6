"""Values that everything is made of: errors, names, images, text, geometry, boxes, files."""
