// Numbers and times in the reader's language.

import { language } from "./i18n.js";

const cache = new Map();
function number(digits) {
  if (!cache.has(digits)) cache.set(digits, new Intl.NumberFormat(language, { maximumFractionDigits: digits }));
  return cache.get(digits);
}

export const NONE = "–";

export function count(value) {
  return value === null || value === undefined ? NONE : number(0).format(value);
}

export function rate(value) {
  if (value === null || value === undefined) return NONE;
  return number(value < 10 ? 1 : 0).format(value);
}

export function percent(value) {
  return value === null || value === undefined ? NONE : `${number(2).format(value)} %`;
}

/** Seconds as "85 ms" or "1.2 s". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 1) return `${number(seconds < 0.01 ? 1 : 0).format(seconds * 1000)} ms`;
  return `${number(seconds < 10 ? 2 : 1).format(seconds)} s`;
}

/** Two durations as "16 / 46 ms", or "85 ms / 1.2 s". */
export function pair(low, high) {
  if (low === null || high === null) return NONE;
  const [first, second] = [duration(low), duration(high)];
  const unit = second.slice(second.indexOf(" "));
  return `${first.endsWith(unit) ? first.slice(0, -unit.length) : first} / ${second}`;
}

const clock = new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat(language, { month: "short", day: "numeric" });

const minutes = new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

export function minute(value) {
  return minutes.format(new Date(value));
}

/** A time as "14:03:21", with the day if it is another one. */
export function time(value) {
  const at = new Date(value);
  if (Number.isNaN(at.getTime())) return NONE;
  return at.toDateString() === new Date().toDateString() ? clock.format(at) : `${day.format(at)}, ${clock.format(at)}`;
}
