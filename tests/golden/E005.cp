let late = (progress > 0.5
