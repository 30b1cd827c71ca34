"""The package of the NanoGPT speedrun course; generated from `nbs/` by nbdev."""

__version__ = "0.1.0"
