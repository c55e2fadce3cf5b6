"""Values and utilities shared by all packages: errors, registries, images, text, geometry, boxes, files."""
