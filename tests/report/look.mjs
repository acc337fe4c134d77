// node look.mjs TOOLS PICTURES PAGE…: opens each page as a person would, and fails if anything is wrong with it.
import {createRequire} from 'node:module';
import {readFileSync} from 'node:fs';
import path from 'node:path';

const [tools, pictures, ...pages] = process.argv.slice(2);
const require = createRequire(path.join(tools, 'package.json'));
const puppeteer = require('puppeteer-core');
const axe = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');

const wrong = [];
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--force-color-profile=srgb'],
});
for (const file of pages) {
  const name = path.basename(file, '.html');
  for (const scheme of ['light', 'dark']) {
    for (const width of [375, 768, 1280]) {
      const where = `${name}, ${width} wide, ${scheme}`;
      const page = await browser.newPage();
      page.on('console', message => wrong.push(`${where}: console: ${message.text()}`));
      page.on('pageerror', error => wrong.push(`${where}: ${error}`));
      page.on('request', request => {
        if (!request.url().startsWith('file:')) wrong.push(`${where}: it asks for ${request.url()}`);
      });
      await page.emulateMediaFeatures([{name: 'prefers-color-scheme', value: scheme}]);
      await page.setViewport({width, height: 900});
      await page.goto(`file://${path.resolve(file)}`);
      await page.screenshot({path: path.join(pictures, `${name}-${width}-${scheme}.png`), fullPage: true});
      const found = await page.evaluate(() => {
        const found = [];
        const width = document.documentElement.clientWidth;
        if (document.documentElement.scrollWidth > width) {
          found.push(`it scrolls sideways: ${document.documentElement.scrollWidth} of ${width}`);
        }
        for (const text of document.querySelectorAll('svg text')) {
          const svg = text.closest('svg').getBoundingClientRect();
          const box = text.getBoundingClientRect();
          if (svg.width && (box.left < svg.left - 1 || box.right > svg.right + 1 || box.bottom > svg.bottom + 1)) {
            found.push(`cut off: ${text.textContent}`);
          }
          if (svg.width && box.height < 9) found.push(`too small to read: ${text.textContent}`);
        }
        const shown = [...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0);
        if (shown.length !== document.querySelectorAll('figure').length) found.push('not one picture a figure');
        // Texts of one row or axis lie beside each other.
        for (const svg of shown) {
          const boxes = [...svg.querySelectorAll('text')].map(text => [text, text.getBoundingClientRect()]);
          boxes.forEach(([a, box], index) => boxes.slice(index + 1).forEach(([b, other]) => {
            const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
            const down = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
            if (across > 1 && down > 5) found.push(`${a.textContent} lies on ${b.textContent}`);
          }));
        }
        return found;
      });
      wrong.push(...found.map(text => `${where}: ${text}`));
      if (name === path.basename(pages.at(-1), '.html') && scheme === 'light' && width === 1280) {
        await page.setViewport({width: 1000, height: 900});
        // Below the name of the store, which is this machine's.
        const [top, bottom] = await page.evaluate(() => [
          document.querySelector('.cards').getBoundingClientRect().top + scrollY,
          document.querySelector('#loss figure').getBoundingClientRect().bottom + scrollY,
        ]);
        const clip = {x: 0, y: top - 16, width: 1000, height: bottom - top + 32};
        await page.screenshot({path: path.join(pictures, 'readme.png'), clip});
      }
      // The page's own policy would stop it: it is read into a world of its own.
      await page.setBypassCSP(true);
      await page.reload();
      await page.evaluate(() => document.querySelectorAll('details').forEach(details => { details.open = true; }));
      await page.evaluate(axe);
      const {violations} = await page.evaluate(() => globalThis.axe.run(document, {resultTypes: ['violations']}));
      for (const {id, help, nodes} of violations) {
        wrong.push(`${where}: ${id}: ${help}: ${nodes.slice(0, 3).map(node => node.html).join('; ')}`);
      }
      await page.close();
    }
  }
  const page = await browser.newPage();
  await page.goto(`file://${path.resolve(file)}`);
  await page.pdf({path: path.join(pictures, `${name}.pdf`), format: 'A4', printBackground: false});
  await page.close();
}
await browser.close();
console.log(`${pages.length} pages in 6 forms: ${wrong.length} faults`);
if (wrong.length) {
  console.error(wrong.join('\n'));
  process.exit(1);
}
