let early = late + 1
let late = early + 1
match attention every late -> reuse
