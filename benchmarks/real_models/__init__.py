"""The paper's single-image protocol on real models: the same arms, with CLIP and DINO."""
