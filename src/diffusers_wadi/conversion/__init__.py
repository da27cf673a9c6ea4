"""From and to what others use: adapters out of checkpoints, one-file checkpoints, plain LoRAs."""

from diffusers_wadi.conversion.extraction import Extraction, extract_lorad
from diffusers_wadi.conversion.lora import LoRAExport, export_lora
from diffusers_wadi.conversion.report import ConversionReport, LayerReport, LeftOut
from diffusers_wadi.conversion.single_file import export_single_file

__all__ = [
    "ConversionReport",
    "Extraction",
    "LayerReport",
    "LeftOut",
    "LoRAExport",
    "export_lora",
    "export_single_file",
    "extract_lorad",
]
