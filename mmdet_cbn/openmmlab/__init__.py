"""What reaches into mmengine and mmdet: checkpoints, configs of this package, and mmdet's tools."""
