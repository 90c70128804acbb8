// The live connection: follows /ops/events, and connects again when it breaks. Where the events do
// not come through, because something in between holds them back, it asks for /ops/status instead.

import { call, events, open, patched, Refused } from "./api.js";

const SILENCE = 40_000; // the gateway sends something every 15 s
const FIRST_EVENT = 6_000; // the gateway sends the first one at once
const POLL_EVERY = 2_000;
const POLLS = 15; // before the events are tried again
const FIRST_WAIT = 500;
const LONGEST_WAIT = 4_000;

/** Follows the gateway's state. `onChange` is called after each change of `state`. */
export class Stream {
  constructor(onChange) {
    this.onChange = onChange;
    this.state = { phase: "loading", status: null, series: null, since: null, message: "", updated: null };
    this.tier = null;
    this.run = 0;
    this.wait = FIRST_WAIT;
    this.polls = 0;
  }

  /** Connect, or connect anew, for instance with another tier or key. */
  start() {
    this.stop();
    this.follow(++this.run);
  }

  stop() {
    this.run++;
    this.controller?.abort();
    clearTimeout(this.timer);
  }

  /** Show the series of another tier; null: of all tiers. */
  choose(tier) {
    this.tier = tier;
    this.state.series = null;
    this.start();
  }

  async follow(run) {
    this.controller = new AbortController();
    try {
      if (this.polls > 0) this.polls--;
      else await this.listen(run, this.controller);
    } catch (error) {
      if (error instanceof Refused && error.status !== 503) {
        this.lose(run, error);
        return;
      }
    }
    if (run !== this.run) return;
    try {
      const { series, ...status } = await call("GET", `ops/status${this.query()}`, { signal: AbortSignal.timeout(SILENCE) });
      if (run !== this.run) return;
      this.take("status", status);
      this.take("series", series);
      this.timer = setTimeout(() => this.follow(run), POLL_EVERY);
    } catch (error) {
      this.lose(run, error);
    }
  }

  query() {
    return this.tier === null ? "" : `?tier=${encodeURIComponent(this.tier)}`;
  }

  /** Follow the events until they end. */
  async listen(run, controller) {
    let silence = setTimeout(() => {
      this.polls = POLLS;
      controller.abort();
    }, FIRST_EVENT);
    const alive = () => {
      clearTimeout(silence);
      silence = setTimeout(() => controller.abort(), SILENCE);
    };
    try {
      const response = await open("GET", `ops/events${this.query()}`, { signal: controller.signal });
      for await (const [name, text] of events(response, alive)) {
        if (run !== this.run) return;
        this.take(name, JSON.parse(text));
      }
    } finally {
      clearTimeout(silence);
    }
  }

  take(name, value) {
    const { state } = this;
    if (name === "status") state.status = value;
    else if (name === "patch") state.status = patched(state.status, value);
    else if (name === "series") state.series = value;
    else if (name === "sample" && state.series) append(state.series, value, state.status.live.kept);
    this.wait = FIRST_WAIT;
    state.phase = "live";
    state.updated = Date.now();
    this.onChange();
  }

  lose(run, error) {
    if (run !== this.run) return;
    const { state } = this;
    const refused = error instanceof Refused ? error : null;
    if (refused?.status === 401 || refused?.status === 403) {
      state.phase = refused.status === 401 ? "locked" : "forbidden";
      state.message = refused.message;
      this.onChange();
      return;
    }
    if (refused?.status === 400 && this.tier !== null) {
      this.tier = null; // the settings no longer have this tier
    }
    if (state.phase !== "lost") state.since = Date.now();
    state.phase = "lost";
    state.message = refused ? refused.message : "";
    this.onChange();
    this.timer = setTimeout(() => this.follow(run), this.wait);
    this.wait = Math.min(this.wait * 2, LONGEST_WAIT);
  }
}

function append(series, sample, kept) {
  series.at = [...series.at, ...sample.at].slice(-kept);
  for (const [backend, figures] of Object.entries(sample.backends)) {
    const known = (series.backends[backend] ??= {});
    for (const [name, values] of Object.entries(figures)) known[name] = [...(known[name] ?? []), ...values].slice(-kept);
  }
}
