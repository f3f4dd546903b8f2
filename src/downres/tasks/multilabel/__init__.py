"""Multi-label classification: any number of classes an image, judged by mean average precision."""
