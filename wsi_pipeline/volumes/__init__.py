"""Drawing tiles and volumes from noise, translating volumes, and the files that volumes live in."""
