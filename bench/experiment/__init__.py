"""Does mixing quantized convolution with quantized attention make errors travel?"""
