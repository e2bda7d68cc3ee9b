"""Small vision-language models that ship with the package, and the scenes they were trained and are tested on."""
