/**
 * A client of the users service, to copy. It needs `fetch`, and nothing else.
 *
 *     const client = new Client("https://users.example", localStorage);
 *     await client.logIn("ada@example.com", "correct horse battery");
 *     console.log(await client.call("GET", "/auth/status"));
 *     await client.logOut();
 *
 * It refreshes its tokens before they expire, and waits when the service asks it to wait. All tabs
 * of a site share one session.
 */

const KEY = "users-service"; // of the token pair in the storage, and of the lock
const TRIES = 4; // of a request that is answered 429 or 503
const LONGEST_WAIT = 30; // seconds; a longer Retry-After is left to the caller
const TIMEOUT = 7_000; // ms; so four tries of a lost refresh fit into the 30 s of the service
const RENEWABLE = ["token_expired", "token_invalid"]; // codes after which a refresh may help

type Json = Record<string, unknown>;
type Refusal = { code?: string; message?: string; errors?: Record<string, string> };
type Tokens = { auth_token: string; refresh_token: string };
type Lifetimes = { expires_in: number; refresh_expires_in?: number }; // seconds
type Pair = Tokens & { refresh_at: number }; // ms since 1970

/**
 * A refusal. `body.code` is for programs, and `message` is for people. A `status` of 401 means that
 * the user has to log in.
 */
export class ApiError extends Error {
  constructor(readonly status: number, readonly body: Refusal, readonly retryAfter?: number) {
    super(body.message ?? `HTTP status ${status}`);
  }
}

/**
 * The session of one user.
 *
 * `storage` keeps the token pair; all tabs have the same localStorage. `locks` lets one tab refresh
 * at a time. Pages without HTTPS have no locks: if two of their tabs refresh at once, the service
 * gives both the same pair.
 */
export class Client {
  private refreshing: Promise<Pair> | undefined;

  constructor(
    private readonly url: string,
    private readonly storage: Pick<Storage, "getItem" | "setItem" | "removeItem">,
    private readonly locks: Pick<LockManager, "request"> | undefined = globalThis.navigator?.locks,
  ) {}

  /**
   * Start a session. An ApiError with the code mfa_required asks for a code, of the authenticator or
   * a recovery code: log in again with it.
   */
  async logIn(email: string, password: string, code?: string): Promise<void> {
    await this.getPair("/auth/login", { email, password, code });
  }

  /** End the session. The pair is forgotten even if the service cannot be reached. */
  async logOut(): Promise<void> {
    await this.call("POST", "/auth/logout").finally(() => this.storage.removeItem(KEY));
  }

  /** Send a request with a valid token, and return the response. */
  async call<T = Json>(method: string, path: string, body?: Json): Promise<T> {
    const pair = await this.validPair();
    try {
      return await this.send<T>(method, path, body, pair);
    } catch (error) {
      if (!(error instanceof ApiError) || !RENEWABLE.includes(error.body.code ?? "")) {
        throw this.forgetIfOver(error, pair);
      }
    }
    return this.send<T>(method, path, body, await this.validPair(pair));
  }

  /** Return a valid pair. The first of many calls refreshes it, and the others wait. */
  private async validPair(rejected?: Pair): Promise<Pair> {
    const isValid = (pair: Pair) =>
      pair.auth_token !== rejected?.auth_token && Date.now() < pair.refresh_at;
    const refresh = async () => {
      const pair = this.load(); // another tab may have refreshed it
      if (isValid(pair)) return pair;
      return this.getPair("/auth/refresh", { refresh_token: pair.refresh_token }, pair);
    };
    const pair = this.load();
    if (isValid(pair)) return pair;
    const locked = async () => (this.locks ? await this.locks.request(KEY, refresh) : refresh());
    this.refreshing ??= locked().finally(() => (this.refreshing = undefined));
    return this.refreshing;
  }

  /** Get a new pair and store it before its auth_token is used. */
  private async getPair(path: string, body: Json, previous?: Pair): Promise<Pair> {
    const sentAt = Date.now();
    const answer = await this.send<Tokens & Lifetimes>("POST", path, body).catch((error) => {
      throw this.forgetIfOver(error, previous);
    });
    const { auth_token, refresh_token, expires_in, refresh_expires_in = expires_in } = answer;
    // Refresh before the auth_token expires, and long before the refresh_token does: the user may
    // be away for weeks.
    const refresh_at = sentAt + 1_000 * Math.min(0.9 * expires_in, refresh_expires_in / 2);
    const pair = { auth_token, refresh_token, refresh_at };
    this.storage.setItem(KEY, JSON.stringify(pair));
    return pair;
  }

  private load(): Pair {
    const stored = this.storage.getItem(KEY);
    if (!stored) throw new ApiError(401, { code: "token_missing", message: "Please log in." });
    return JSON.parse(stored);
  }

  /** Forget the pair if `error` says that its session is over. Return `error`. */
  private forgetIfOver(error: unknown, pair?: Pair): unknown {
    const stored = this.storage.getItem(KEY) === JSON.stringify(pair);
    if (stored && error instanceof ApiError && error.status === 401) this.storage.removeItem(KEY);
    return error;
  }

  /** Send a request, and repeat it if the service asks for that or a refresh is lost. */
  private async send<T>(method: string, path: string, body?: Json, pair?: Pair): Promise<T> {
    const headers: Record<string, string> = { "Content-Type": "application/json" };
    if (pair) headers.Authorization = `Bearer ${pair.auth_token}`;
    const request = { method, headers, body: body ? JSON.stringify(body) : null };
    for (let tries = 1; ; tries += 1) {
      try {
        return await answer(this.url + path, request);
      } catch (error) {
        const lost = path === "/auth/refresh" ? 0 : undefined; // there was no response
        const wait = error instanceof ApiError ? error.retryAfter : lost;
        if (wait === undefined || wait > LONGEST_WAIT || tries === TRIES) throw error;
        await new Promise((done) => setTimeout(done, 1_000 * wait));
      }
    }
  }
}

/** Return the JSON of a response. Throw an ApiError for a refusal. */
async function answer<T>(url: string, request: RequestInit): Promise<T> {
  const response = await fetch(url, { ...request, signal: AbortSignal.timeout(TIMEOUT) });
  if (response.ok) return response.json();
  const refusal = await response.json().catch(() => ({})); // of a proxy, it may not be JSON
  const seconds = response.headers.get("Retry-After") ?? "";
  const repeatable = [429, 503].includes(response.status) && /^\d+$/.test(seconds);
  throw new ApiError(response.status, refusal, repeatable ? Number(seconds) : undefined);
}
