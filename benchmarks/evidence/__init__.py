"""A single-image customisation benchmark: does the adapter overfit less?"""
