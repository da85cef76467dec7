"""Registration of serial sections: two slides in, a transform file and its measured error out."""
