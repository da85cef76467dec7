"""Translators beside Diffusion-FFPE: path x representation x condition x weight, one sampler, one bundle.

settings          what a recipe says, and what the theory refuses
paths             x_n = a x0 + b x1 + s z: diffusion (VP) and bridges
representations   pixels, or Haar coefficients
conditions        class labels and images beside x_n; classifier-free guidance
losses            one regression loss with its weights
sampler           from noise, or from the source, to an image
bundle            the weights file; importers read foreign ones
"""
