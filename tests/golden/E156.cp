use "./E156.cp"
