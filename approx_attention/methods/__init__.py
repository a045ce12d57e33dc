"""The methods, one file each; `approx_attention.registry` lists them."""
