/**
 * Executes commands on clients of examples/client.ts: a line of JSON on stdin for each command, and
 * a line of JSON on stdout for each result.
 *
 * Every client is a tab; all tabs have the same storage. Time does not pass by itself: sleeping is
 * recorded, and the command "move" moves the clock.
 */

import { ApiError, Client } from "./client.js";

type Command = { tabs: number[]; do: string; arguments: unknown[] };
declare const process: any;
const stored = new Map<string, string>();
const storage = {
  getItem: (key: string) => stored.get(key) ?? null,
  setItem: (key: string, value: string) => void stored.set(key, value),
  removeItem: (key: string) => void stored.delete(key),
};
const waits: number[] = [];
let locked: Promise<unknown> = Promise.resolve();
// Node.js before version 24 has no navigator.locks. They grant an exclusive lock one after the other.
const locks = globalThis.navigator?.locks ?? {
  request: (_name: string, work: any) => (locked = locked.then(() => work(null), () => work(null))),
};
// A client that is given no locks finds none.
Object.defineProperty(globalThis, "navigator", { value: {} });

const realNow = Date.now;
let moved = 0;
Date.now = () => realNow() + moved;
const realSetTimeout = globalThis.setTimeout;
globalThis.setTimeout = ((work: () => void, ms: number) => {
  if (!new Error().stack?.includes("client.js")) return realSetTimeout(work, ms); // node's own
  waits.push(ms / 1_000);
  return realSetTimeout(work);
}) as typeof setTimeout;

let tabs: Client[] = [];

async function execute(command: Command): Promise<unknown> {
  const [first] = command.arguments;
  const results = command.tabs.map((tab) => {
    const client: any = tabs[tab];
    return (client[command.do](...command.arguments) as Promise<unknown>).then(
      (answer) => ({ answer: answer ?? null }),
      (error: unknown) => {
        if (!(error instanceof ApiError)) return { failure: String(error) };
        return { status: error.status, code: error.body.code ?? "", wait: error.retryAfter ?? null };
      },
    );
  });
  if (command.do === "open") {
    const [url, hasLocks] = command.arguments as [string, boolean];
    tabs = [0, 1].map(() => new Client(url, storage, hasLocks ? locks : undefined));
  }
  if (command.do === "move") moved += 1_000 * (first as number);
  if (command.do === "store") for (const key of stored.keys()) stored.set(key, first as string);
  return { results: await Promise.all(results), stored: [...stored.values()][0] ?? null, waits };
}

let text = "";
process.stdin.setEncoding("utf8").on("data", async (part: string) => {
  text += part;
  for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n")) {
    const line = text.slice(0, end);
    text = text.slice(end + 1);
    process.stdout.write(`${JSON.stringify(await execute(JSON.parse(line)))}\n`);
  }
});
