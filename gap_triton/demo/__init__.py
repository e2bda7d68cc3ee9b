"""A small vision-language model that ships with the package, and the scenes it was trained and is tested on."""
