"""The three models of docs/inspecting.md.

Look at one:

    python -m hwbp_compiler explain examples/inspect_models.py:resnet -o iterations=2 --errors --html resnet.html

Write the outputs and pictures of docs/inspecting.md again (pictures need chromium, chromedriver, selenium and Pillow):

    python examples/inspect_models.py
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

OPTIONS = {"iterations": 2, "rewrite": "always"}
DOCS = Path(__file__).resolve().parents[1] / "docs"


def gpt2():
    """GPT-2 small as Hugging Face builds it, random weights, one sentence of 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    model.loss_type = "ForCausalLM"  # without a name, the model logs a warning, which breaks the graph
    tokens = torch.randint(model.config.vocab_size, (1, 32))
    return model, {"input_ids": tokens, "labels": tokens}, lambda output: output.loss


class BasicBlock(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride > 1:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x):
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet32(nn.Module):
    """Three stages of five blocks for images of 32 x 32."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stage1 = self.stage(16, 16, 1)
        self.stage2 = self.stage(16, 32, 2)
        self.stage3 = self.stage(32, 64, 2)
        self.head = nn.Linear(64, classes)

    def stage(self, channels_in, channels, stride):
        rest = (BasicBlock(channels, channels, 1) for _ in range(4))
        return nn.Sequential(BasicBlock(channels_in, channels, stride), *rest)

    def forward(self, x):
        return self.head(self.stage3(self.stage2(self.stage1(self.stem(x)))).mean((2, 3)))


def resnet():
    torch.manual_seed(0)
    target = torch.randint(10, (8,))
    return ResNet32(), torch.randn(8, 3, 32, 32), lambda output: F.cross_entropy(output, target)


class NextValue(nn.Module):
    """A loop over a GRU cell that predicts the next value at every step."""

    def __init__(self, hidden=32):
        super().__init__()
        self.cell = nn.GRUCell(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], self.cell.hidden_size)
        predictions = []
        for x_t in x:
            h = self.cell(x_t, h)
            predictions.append(self.head(h))
        return torch.stack(predictions)


def gru():
    torch.manual_seed(0)
    wave = torch.sin(torch.arange(65.0) / 3 + torch.rand(4, 1) * 6).T.unsqueeze(-1)
    return NextValue(), wave[:-1], lambda output: F.mse_loss(output, wave[1:])


# -- docs/inspecting.md -----------------------------------------------------------------------------------------

MODELS = {"gpt2": gpt2, "resnet": resnet, "gru": gru}
# Per picture: model, width and height in pixels, dark, which block is opened.
PICTURES = {
    "inspecting-gpt2": ("gpt2", 1080, 980, False, 0),
    "inspecting-resnet": ("resnet", 1080, 900, False, 1),
    "inspecting-gru": ("gru", 1080, 900, True, 1),
    "inspecting-phone": ("gru", 390, 844, False, None),
}


def report_of(name):
    from hwbp_compiler import explain

    model, inputs, loss = MODELS[name]()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    return explain(model, *args, options=OPTIONS, loss=loss, errors=True, **kwargs)


def with_outputs(document: str, outputs: dict[str, str]) -> str:
    """``document`` with the block after every ``<!-- output: name -->`` replaced."""
    for name, output in outputs.items():
        block = re.compile(rf"(<!-- output: {name} -->\n```text\n).*?(```)", re.DOTALL)
        assert block.search(document), f"no place for the output of {name}"
        document = block.sub(lambda found, output=output: f"{found[1]}{output}\n{found[2]}", document)
    return document


def take_pictures(pages: dict[str, Path]) -> None:
    from PIL import Image
    from selenium import webdriver

    os.environ["SE_AVOID_STATS"] = "true"  # by default, selenium reports usage over the network
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    for picture, (name, width, height, dark, block) in PICTURES.items():
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get(pages[name].as_uri())
        if block is not None:
            opened = f"document.querySelectorAll('.block')[{block}]"
            browser.execute_script(f"{opened}.dispatchEvent(new MouseEvent('click'))")
        else:
            browser.execute_script("document.querySelector('svg.chain').scrollIntoView()")
        shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        shot.quantize(32).save(DOCS / f"{picture}.png", optimize=True)
    browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"some of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--no-pictures", action="store_true", help="write only the text")
    arguments = parser.parse_args()
    document = DOCS / "inspecting.md"
    with tempfile.TemporaryDirectory() as folder:
        outputs, pages = {}, {}
        for name in arguments.models:
            report = report_of(name)
            outputs[name] = str(report)
            pages[name] = Path(folder) / f"{name}.html"
            report.to_html(pages[name])
        document.write_text(with_outputs(document.read_text(), outputs))
        if not arguments.no_pictures:
            for picture in [p for p, (name, *_) in PICTURES.items() if name not in pages]:
                del PICTURES[picture]
            take_pictures(pages)


if __name__ == "__main__":
    main()
