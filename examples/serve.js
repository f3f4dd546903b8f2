// `node serve.js run/best photo.jpg …` prints what the folder's model.onnx answers, a line of JSON for each picture.
//
// Needs `npm install onnxruntime-node sharp` and nothing of downres: all numbers are those of manifest.json, which explains them.
// For classes, labels, numbers and embeddings. sharp opens files alone; the resize is Pillow's, pass by pass, so that the network
// gets what serve.py gives it. Use it as it is, or copy what you need.
"use strict";
const fs = require("fs");
const path = require("path");
const ort = require("onnxruntime-node");
const sharp = require("sharp");

const [folder, ...names] = process.argv.slice(2);
const refuse = (sentence) => { console.error(sentence); process.exit(2); };
if (!names.length) refuse("usage: node serve.js FOLDER PICTURE …");
const MANIFEST = JSON.parse(fs.readFileSync(path.join(folder, "manifest.json"), "utf8"));
const { steps: STEPS, output: OUTPUT, task: TASK, classes: CLASSES } = MANIFEST;
if (MANIFEST.format !== 3) refuse(`The manifest has format ${MANIFEST.format}, this program reads 3.`);
if (MANIFEST.runtime.name !== "onnxruntime") refuse(`The model is one of ${MANIFEST.runtime.name}, this program has ONNX Runtime.`);
if (STEPS.decode.colours === null) refuse("The model takes numbers of TIFF or .npy files: serve.py has that.");
if (!STEPS.resize.antialias) refuse("The model takes pictures that were resized as OpenCV does: serve.py has that.");
if (!["classification", "multilabel", "regression", "agreement"].includes(TASK.name) || OUTPUT.shape.length !== 2)
  refuse(`Answers of the task ${TASK.name} are not lists of numbers: serve.py has it.`);

/* Half to even, as Python rounds. */
const round = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/* The first picture of a file: upright, 8 bits a channel, nothing transparent; grey by ITU-R 601 for networks of one channel. */
async function opened(name) {
  const file = sharp(name, { ignoreIcc: true }).autoOrient();
  const { depth, space } = await file.metadata();
  if (depth !== "uchar" || space === "cmyk") refuse(`${name} has ${space === "cmyk" ? "inks" : "more than 8 bits a channel"}: serve.py opens it.`);
  const { data, info } = await file.removeAlpha().toColourspace("srgb").raw().toBuffer({ resolveWithObject: true });
  const picture = { width: info.width, height: info.height, channels: info.channels, data };
  if (STEPS.decode.colours !== "L") return picture;
  const grey = Uint8Array.from({ length: info.width * info.height }, (_, i) =>
    (19595 * data[i * info.channels] + 38470 * data[i * info.channels + 1] + 7471 * data[i * info.channels + 2] + 32768) >> 16);
  return { ...picture, channels: 1, data: grey };
}

const FILTERS = {  // how far they reach, and their weight at a distance
  bilinear: [1, (d) => Math.max(0, 1 - d)],
  bicubic: [2, (d) => (d < 1 ? (1.5 * d - 2.5) * d * d + 1 : d < 2 ? (((d - 5) * d + 8) * d - 4) * -0.5 : 0)],
};

/* For each of `want` pixels the first of `have` that counts, and what it and the next ones count, of 2 to the power of 22. */
function weights(have, want) {
  const [reach, filter] = FILTERS[STEPS.resize.filter];
  const scale = have / want, wide = Math.max(scale, 1), support = reach * wide;
  return Array.from({ length: want }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5)), end = Math.min(have, Math.trunc(centre + support + 0.5));
    const each = Array.from({ length: end - first }, (_, k) => filter(Math.abs((k + first - centre + 0.5) / wide)));
    const sum = each.reduce((a, b) => a + b, 0);
    return [first, each.map((w) => Math.trunc((w / sum) * 2 ** 22 + Math.sign(w) * 0.5))];
  });
}

/* Pillow's Image.resize: across, then down, each rounded to 8 bits. */
function resized({ width, height, channels, data }, wide, tall) {
  const pass = (from, to, lines, lineStep, step, outLine, outStep) => {
    const out = new Uint8Array(lines * to * channels);
    weights(from, to).forEach(([first, each], i) => {
      for (let line = 0; line < lines; line++) {
        for (let c = 0; c < channels; c++) {
          let sum = 2 ** 21;
          for (let k = 0; k < each.length; k++) sum += each[k] * data[line * lineStep + (first + k) * step + c];
          out[line * outLine + i * outStep + c] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** 22)));
        }
      }
    });
    data = out;
  };
  if (wide !== width) pass(width, wide, height, width * channels, channels, wide * channels, channels);
  if (tall !== height) pass(height, tall, wide, channels, wide * channels, channels, wide * channels);
  return { width: wide, height: tall, channels, data };
}

/* The picture at the size of the network's input: what of it is shown, and where. */
function fitted(picture) {
  const [tall, wide] = STEPS.resize.to, { width, height } = picture;
  if (STEPS.resize.fit === "stretch") return resized(picture, wide, tall);
  if (STEPS.resize.fit === "crop") {
    const byWidth = wide * height >= tall * width;
    const w = byWidth ? wide : Math.max(wide, Math.floor((tall * width) / height));
    const h = byWidth ? Math.max(tall, Math.floor((wide * height) / width)) : tall;
    const [rows, columns] = STEPS.crop.size;
    return placed(resized(picture, w, h), round((h - rows) / 2), round((w - columns) / 2), rows, columns, []);
  }
  const scale = Math.min(tall / height, wide / width);
  const [h, w] = [[height, tall], [width, wide]].map(([side, to]) => Math.min(to, Math.max(1, round(side * scale))));
  return placed(resized(picture, w, h), 0, 0, ...STEPS.pad.size, STEPS.pad.fill);
}

/* `rows` by `columns` pixels from (top, left) on, `fill` where there are none. */
function placed({ width, height, channels, data }, top, left, rows, columns, fill) {
  const out = new Uint8Array(rows * columns * channels);
  for (let i = 0; i < out.length; i++) {
    const c = i % channels, x = left + (((i - c) / channels) % columns), y = top + Math.floor(i / channels / columns);
    out[i] = x < width && y < height ? data[(y * width + x) * channels + c] : fill[c];
  }
  return { width: columns, height: rows, channels, data: out };
}

/* float32 (1, channels, height, width). */
function networkInput(picture) {
  const { width, height, channels, data } = fitted(picture), pixels = width * height;
  const { divide_by, mean, std, channels: order } = STEPS.normalise, f = Math.fround;
  const values = new Float32Array(pixels * channels);
  for (let c = 0; c < channels; c++) {
    const from = order === "BGR" ? channels - 1 - c : c;
    for (let i = 0; i < pixels; i++) {
      values[c * pixels + i] = f(f(f(data[i * channels + from] / f(divide_by)) - f(mean[c])) / f(std[c]));
    }
  }
  return new ort.Tensor("float32", values, [1, channels, height, width]);
}

/* Under the names that `downres predict --json` has: the likeliest classes in percent, or the numbers. */
function answer(values) {
  const sigmoid = (v) => 1 / (1 + Math.exp(-v));
  let share;
  if (TASK.name === "multilabel") share = OUTPUT.values === "logits" ? values.map(sigmoid) : values;
  else if (OUTPUT.values === "logit" || OUTPUT.values === "probability") {
    const second = OUTPUT.values === "logit" ? sigmoid(values[0]) : values[0];
    share = [1 - second, second];
  } else if (OUTPUT.values === "logits" || OUTPUT.values === "probabilities") {
    const largest = Math.max(...values), each = OUTPUT.values === "logits" ? values.map((v) => Math.exp(v - largest)) : values;
    const sum = each.reduce((a, b) => a + b, 0);
    share = each.map((v) => v / sum);
  } else return OUTPUT.values === "embedding" ? { embedding: values } : { names: CLASSES, values };
  const best = share.map((_, i) => i).sort((a, b) => share[b] - share[a]).slice(0, 5);
  return { classes: best.map((i) => CLASSES[i]), probabilities: best.map((i) => 100 * share[i]) };
}

(async () => {
  const session = await ort.InferenceSession.create(path.join(folder, "model.onnx"));
  for (const name of names) {
    const found = await session.run({ [MANIFEST.input.name]: networkInput(await opened(name)) });
    console.log(JSON.stringify({ image: name, ...answer(Array.from(found[session.outputNames[0]].data)) }));
  }
})().catch((error) => refuse(String(error.message ?? error)));
