use pab with spatial_names = ["(blocks|layers"]
