// Open a notebook in JupyterLab, run it, move the slider of its last cell, and say whether the picture changed.
// node move_slider.js URL CHROMIUM PLAYWRIGHT_FOLDER [dry]      ("dry" does not touch the slider)
// Prints one line of JSON: {"before": ..., "after": ..., "value_before": ..., "value_after": ...}.
const { createHash } = require("crypto");
const [url, chromium, folder, dry] = process.argv.slice(2);
const playwright = require(folder);
const wait = 240_000; // a slow machine may take minutes to start a kernel

async function main() {
  const browser = await playwright.chromium.launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-gpu"] });
  try {
    const page = await browser.newPage({ viewport: { width: 1200, height: 1400 } });
    page.setDefaultTimeout(wait);
    await page.goto(url);
    const name = new URL(url).pathname.split("/").pop();
    await page.waitForFunction((name) => {
      const current = window.jupyterapp?.shell?.currentWidget; // at first it may be a notebook of the last visit
      return current?.context?.path === name && current.sessionContext?.isReady;
    }, name, { timeout: wait });
    const ran = await page.evaluate(async () => {
      const app = window.jupyterapp;
      await app.shell.currentWidget.sessionContext.ready;
      return await app.commands.execute("notebook:run-all-cells");
    });
    if (ran === false) {
      const words = await page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]').allInnerTexts();
      throw new Error("a cell failed: " + words.join("\n").slice(-800));
    }
    const slider = page.locator(".jupyter-widgets .noUi-handle").last();
    await slider.scrollIntoViewIfNeeded();
    const picture = page.locator(".jupyter-widgets img").last();
    await picture.waitFor();
    const hash = async () => createHash("sha256").update((await picture.getAttribute("src")) ?? "").digest("hex");
    const value = async () => (await slider.getAttribute("aria-valuenow")) ?? "";
    const [before, valueBefore] = [await hash(), await value()];
    if (!dry) {
      await slider.focus();
      const lowest = await slider.getAttribute("aria-valuemin");
      await page.keyboard.press(Number(valueBefore) > Number(lowest) ? "ArrowLeft" : "ArrowRight");
    }
    let after = before;
    for (let i = 0; i < (dry ? 6 : 80) && after === before; i++) {
      await page.waitForTimeout(500);
      after = await hash().catch(() => before); // the picture is away for a moment while it is replaced
    }
    console.log(JSON.stringify({ before, after, value_before: valueBefore, value_after: await value() }));
  } catch (error) {
    if (process.env.MINIMIND_SCREENSHOT) await browser.contexts()[0]?.pages()[0]?.screenshot({ path: process.env.MINIMIND_SCREENSHOT });
    throw error;
  } finally {
    await browser.close();
  }
}

main().catch((error) => {
  console.error(String(error));
  process.exit(1);
});
