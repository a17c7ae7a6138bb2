match attention every 2
