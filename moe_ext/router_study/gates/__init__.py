"""The gates of a mixture, whatever it is made of: how to listen to them and how to overrule them."""
