"""Many requests, one pipeline: they are drawn in batches, so that a device is kept busy."""

from diffusers_wadi.serving.batcher import ImageBatcher, ImageFuture
from diffusers_wadi.serving.statistics import BatcherStatistics
from diffusers_wadi.serving.waiting import QueueFullError

__all__ = ["BatcherStatistics", "ImageBatcher", "ImageFuture", "QueueFullError"]
