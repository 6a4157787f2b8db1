"""Small data sets in COCO format, drawn or made from stored images."""
