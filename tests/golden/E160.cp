use pab with spatial_evry = 3
