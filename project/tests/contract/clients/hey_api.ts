// The life cycle of an account with the client that @hey-api/openapi-ts generates.
// Usage: node hey_api.ts BASE_URL ADMIN_EMAIL ADMIN_PASSWORD
import assert from 'node:assert/strict';
import { createClient, createConfig, type Client } from './hey_api/client/index.ts';
import * as api from './hey_api/sdk.gen.ts';
import type { Error, FieldError, ServerError, Tokens } from './hey_api/types.gen.ts';
import { totp } from './totp.ts';

type Failure = Error | FieldError | ServerError;

const [baseUrl = '', adminEmail = '', adminPassword = ''] = process.argv.slice(2);
const password = 'correct horse battery';
const newPassword = 'another horse battery';
const anonymous = createClient(createConfig({ baseUrl }));

function authenticated(pair: Tokens): Client {
  return createClient(createConfig({ baseUrl, auth: pair.auth_token }));
}

function log(step: string, response: Response | undefined, body: object): void {
  console.log(step.padEnd(28), response?.status, Object.keys(body).join(' '));
}

/** Return the body of a success. */
function success<Body extends object>(
  step: string,
  result: { data?: Body; error?: unknown; response?: Response },
): Body {
  assert.ok(result.data, `${step}: ${JSON.stringify(result.error)}`);
  log(step, result.response, result.data);
  return result.data;
}

/** Return the body of an error. */
function failure<Body extends Failure>(
  step: string,
  result: { data?: unknown; error?: Body; response?: Response },
): Body {
  assert.ok(result.error, `${step}: ${JSON.stringify(result.data)}`);
  log(step, result.response, result.error);
  return result.error;
}

async function logIn(email: string, password: string): Promise<Tokens> {
  const body = { email, password };
  return success('log in', await api.loginUser({ client: anonymous, body }));
}

async function ownAccount(): Promise<void> {
  const body = { username: 'hey', email: 'hey@example.com', password };
  success('ready', await api.getReadiness({ client: anonymous }));
  let pair: Tokens = success('register', await api.registerUser({ client: anonymous, body }));
  const taken = failure('register again', await api.registerUser({ client: anonymous, body }));
  assert.equal(taken.code, 'user_exists');
  assert.ok('errors' in taken && Object.keys(taken.errors).length > 0);

  const { refresh_token } = pair;
  const refreshed = await api.refreshTokens({ client: anonymous, body: { refresh_token } });
  pair = success('refresh', refreshed);
  const client = authenticated(pair);
  const caller = success('status', await api.getUserStatus({ client })).data;
  assert.equal(caller.username, 'hey');

  const other = authenticated(await logIn(body.email, password));
  const { sessions } = success('sessions', await api.listSessions({ client })).data;
  assert.deepEqual(sessions.map((each) => each.current), [false, true]);
  const session = { session_id: sessions[0]!.id };
  success('end a session', await api.endSession({ client, path: session }));
  const ended = failure('its status', await api.getUserStatus({ client: other }));
  assert.equal(ended.code, 'session_ended');

  const path = { user_id: caller.id };
  const user = success('user', await api.getSingleUser({ client, path })).data;
  assert.equal(user.created_at, caller.created_at);
  const change = { username: 'heyday', current_password: password };
  const changed = await api.changeUser({ client, path, body: change });
  assert.equal(success('change the user', changed).data.username, 'heyday');
  const events = success('events', await api.listEvents({ client, path })).data;
  assert.equal(events.events[0]?.kind, 'user_changed');

  const wrong = { current_password: 'wrong', new_password: newPassword };
  const refused = failure('wrong password', await api.changePassword({ client, body: wrong }));
  assert.equal(refused.code, 'wrong_password');
  const right = { current_password: password, new_password: newPassword };
  success('password', await api.changePassword({ client, body: right }));
  success('log out', await api.logoutUserPost({ client }));
  failure('status', await api.getUserStatus({ client }));

  const again = authenticated(await logIn(body.email, newPassword));
  await secondFactor(again, body.email);
  const deletion = { current_password: newPassword };
  success('delete the account', await api.deleteAccount({ client: again, body: deletion }));
}

async function secondFactor(client: Client, email: string): Promise<void> {
  const current = { current_password: newPassword };
  const { secret } = success('begin', await api.beginTotp({ client, body: current })).data;
  const first = { code: totp(secret) };
  const confirmed = success('confirm', await api.confirmTotp({ client, body: first })).data;
  const [one = '', two = ''] = confirmed.recovery_codes;

  const credentials = { email, password: newPassword };
  const login = await api.loginUser({ client: anonymous, body: credentials });
  const refused = failure('log in', login);
  assert.equal(refused.code, 'mfa_required');
  assert.ok('mfa_token' in refused && refused.mfa_token);
  const second = { mfa_token: refused.mfa_token, code: one };
  success('second step', await api.loginWithCode({ client: anonymous, body: second }));
  const state = success('state', await api.getTotp({ client })).data;
  assert.deepEqual(state, { enabled: true, recovery_codes_left: 9 });
  const again = { ...credentials, code: one };
  const used = await api.loginUser({ client: anonymous, body: again });
  assert.equal(failure('used code', used).code, 'wrong_code');
  const off = { ...current, code: two };
  success('turn off', await api.turnOffTotp({ client, body: off }));
}

async function otherAccounts(): Promise<void> {
  const client = authenticated(await logIn(adminEmail, adminPassword));
  for (const username of ['hey-1', 'hey-2']) {
    const body = { username, email: `${username}@example.com`, password };
    success('add', await api.addUser({ client, body }));
  }
  let page = success('users', await api.listUsers({ client, query: { limit: 1 } })).data;
  assert.deepEqual(page.users.map((user) => user.username), ['hey-2']);
  const next = { limit: 1, after: page.next ?? undefined };
  page = success('next page', await api.listUsers({ client, query: next })).data;
  assert.deepEqual(page.users.map((user) => user.username), ['hey-1']);
  const found = await api.listUsers({ client, query: { query: 'hey-' } });
  const { users } = success('search', found).data;
  assert.deepEqual(users.map((user) => user.admin), [false, false]);
  const refused = failure('no page', await api.listUsers({ client, query: { limit: 0 } }));
  assert.equal(refused.code, 'invalid_payload');
  for (const { id } of users) {
    const path = { user_id: id };
    const changed = await api.changeUser({ client, path, body: { active: false } });
    assert.equal(success('deactivate', changed).data.active, false);
    const body = { code: '123456' }; // the admin has no authenticator, so it is ignored
    const reset = await api.resetTotp({ client, path, body });
    assert.equal(failure('no authenticator', reset).code, 'totp_not_found');
    success('delete', await api.deleteUser({ client, path }));
    const gone = failure('user', await api.getSingleUser({ client, path }));
    assert.equal(gone.code, 'user_not_found');
  }
  success('log out', await api.logoutUserPost({ client }));
}

await ownAccount();
await otherAccounts();
