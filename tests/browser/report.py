#!/usr/bin/env python3
"""Opens `report.html` in headless Chromium: at 390 and 1280 pixels, in the light and in the dark colour scheme.

    tests/browser/report.py [--polder target/release/polder] [--out target/browser]

It trains two short runs, measures their curvature, maps a landscape around each, and writes the report. A view
fails on a console error or warning, an exception, a request other than for the page itself, or a page wider than the
window. The two colour schemes must differ. A page with one fault of each kind is opened first: the test fails if it
misses one of them. In the last view every button is pressed and every chart pointed at. Screenshots go to --out. Needs Chromium and the Python package `websocket-client`.
"""

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    import websocket
except ImportError:
    sys.exit("report.py: the Python package websocket-client was not found: pip install websocket-client")

WIDTHS = [390, 1280]
SCHEMES = ["light", "dark"]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
]
TIMEOUT = 60

FAULTY = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>faults</title>
<div style="width: 3000px">wide</div><img src="absent.png">
<script>console.error("an error"); setTimeout(() => { throw new Error("an exception") })</script>"""


def write_report(polder, out):
    """Two runs of a few steps, with everything that the report can show; returns the path of the page."""

    def call(*arguments):
        command = [str(polder), *map(str, arguments)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        if ended.returncode:
            sys.exit(f"report.py: {' '.join(command)}: exit status {ended.returncode}\n{ended.stdout}")

    runs = {"sgd": ["--optimizer", "sgd"], "sam": ["--optimizer", "sam", "--rho", "0.1"]}
    common = ["--train-size", 64, "--batch-size", 32, "--epochs", 2, "--log-every", 1]
    curvature = ["--curvature-every", 1, "--curvature-samples", 32, "--curvature-probes", 2]
    for name, method in runs.items():
        run = out / name
        call("train", *method, *common, *curvature, "--out", run)
        measures = "trace,normalized-trace,top-eigenvalues,spectrum"
        measuring = ["--samples", 32, "--probes", 2, "--top", 2, "--steps", 10]
        call("curvature", "--run", run, "--measure", measures, *measuring, "--out", run)
        call("landscape", "--run", run, "--samples", 32, "--points", 5)
    page = out / "report.html"
    call("report", *(out / name for name in runs), "--out", page)
    return page


# Every chart shows values under the pointer, before and after each of its buttons is pressed.
USE = """(() => {
    const figures = [...document.querySelectorAll("figure[data-chart]")];
    const point = figure => {
        const svg = figure.querySelector("svg"), frame = svg.getBoundingClientRect();
        const at = { clientX: frame.left + 0.9 * frame.width, clientY: frame.top + 0.5 * frame.height };
        svg.dispatchEvent(new PointerEvent("pointermove", at));
        return figure.querySelector(".values").innerText.includes(": ") && !svg.outerHTML.includes("NaN");
    };
    const good = figure => [null, ...figure.querySelectorAll("button"), null].every(button => {
        button?.click();
        return point(figure);
    });
    const values = figures.filter(good).length;
    const lines = () => figures[0].querySelectorAll("svg path").length;
    const before = lines();
    document.querySelector(".legend button").click();
    const hidden = lines() < before;
    const select = document.querySelector(".smoothing select");
    const steps = select?.closest("section").querySelector("figure svg"), single = steps?.outerHTML;
    if (select) {
        select.value = "3";
        select.dispatchEvent(new Event("change"));
    }
    return { charts: figures.length, values, hidden, smoothed: Boolean(select) && steps.outerHTML !== single };
})()"""


class Browser:
    """A Chromium of its own, driven over the DevTools protocol; one tab."""

    def __init__(self, profile):
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if program is None:
            sys.exit("report.py: chromium was not found; on Debian: apt-get install chromium")
        log = open(profile / "chromium.log", "w")
        command = [program, *FLAGS, f"--user-data-dir={profile / 'data'}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.count, self.events = 0, []
        port_file = profile / "data" / "DevToolsActivePort"
        deadline = time.monotonic() + TIMEOUT
        while not (port_file.exists() and len(port_file.read_text().split("\n")) >= 2):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                sys.exit(f"report.py: chromium did not start:\n{(profile / 'chromium.log').read_text()}")
            time.sleep(0.1)
        port, path = port_file.read_text().split("\n")[:2]
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=TIMEOUT)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Sends a command and returns its result; events that arrive meanwhile are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.count:
                if "error" in answer:
                    sys.exit(f"report.py: {method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method):
        while not any(event["method"] == method for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def value(self, expression):
        """The value of a JavaScript expression in the page; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def view(self, page, width, scheme, screenshot=None):
        """Loads a page and returns its faults and its background colour."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url="about:blank")
        self.wait_for("Page.loadEventFired")
        self.events.clear()
        url = page.resolve().as_uri()
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")
        # Faults may come after the page has loaded.
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 200)))")
        document = self.value("document.documentElement.scrollWidth")
        window = self.value("document.documentElement.clientWidth")
        faults = []
        if document > window:
            faults.append(f"width: the page is {document} px wide, the window {window} px")
        for event in self.events:
            params = event["params"]
            match event["method"]:
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    text = " ".join(str(argument.get("value")) for argument in params["args"])
                    faults.append(f"console: {text}")
                case "Runtime.exceptionThrown":
                    faults.append(f"exception: {params['exceptionDetails']['text']}")
                case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                    faults.append(f"log: {params['entry']['text']}")
                case "Network.requestWillBeSent":
                    requested = params["request"]["url"]
                    if requested != url and not requested.startswith("data:"):
                        faults.append(f"request: {requested}")
        if screenshot:
            clip = self.whole_page(width)
            image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            screenshot.write_bytes(base64.b64decode(image["data"]))
        return faults, self.value("getComputedStyle(document.body).backgroundColor")

    def use(self):
        """Hides a series, presses every button of a chart and points at every chart; returns the faults."""
        self.events.clear()
        found = self.value(USE)
        faults = [] if found and found["charts"] and found["values"] == found["charts"] else [f"script: {found}"]
        if found and not found["hidden"]:
            faults.append("script: the legend hides no series")
        if found and not found["smoothed"]:
            faults.append("script: the moving average changes no curve")
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                faults.append(f"script: {event['params']['exceptionDetails']['text']}")
        return faults

    def whole_page(self, width):
        height = self.call("Page.getLayoutMetrics")["cssContentSize"]["height"]
        return {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def check(browser, page, out):
    """Every view of the page; returns the faults."""
    faults, backgrounds = [], {}
    for width in WIDTHS:
        for scheme in SCHEMES:
            name = f"{width}-{scheme}"
            found, background = browser.view(page, width, scheme, out / f"report-{name}.png")
            faults += [f"{name}: {fault}" for fault in found]
            backgrounds.setdefault(scheme, set()).add(background)
    faults += browser.use()
    if backgrounds["light"] & backgrounds["dark"]:
        faults.append(f"the background is the same in light and dark: {backgrounds}")
    for selector, least in {"svg": 6, "table": 2, "h2": 4}.items():
        count = browser.value(f"document.querySelectorAll({selector!r}).length")
        if count < least:
            faults.append(f"the page has {count} {selector}, expected at least {least}")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--polder", default="target/release/polder", type=Path)
    parser.add_argument("--out", default="target/browser", type=Path)
    arguments = parser.parse_args()
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    arguments.out.mkdir(parents=True)
    page = write_report(arguments.polder, arguments.out)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        profile = Path(folder)
        faulty = profile / "faulty.html"
        faulty.write_text(FAULTY)
        browser = Browser(profile)
        try:
            found, _ = browser.view(faulty, WIDTHS[0], "light")
            for kind in ("width", "console", "exception", "request"):
                if not any(fault.startswith(f"{kind}: ") for fault in found):
                    sys.exit(f"report.py: missed the {kind} fault of the faulty page; found {found}")
            faults = check(browser, page, arguments.out)
        finally:
            browser.close()
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        sys.exit(1)
    print(f"{page}: no fault in {len(WIDTHS) * len(SCHEMES)} views; screenshots in {arguments.out}")


if __name__ == "__main__":
    main()
