// The life cycle of an account with openapi-fetch and the types of openapi-typescript.
// Usage: node openapi_fetch.ts BASE_URL ADMIN_EMAIL ADMIN_PASSWORD
import assert from 'node:assert/strict';
import createClient from 'openapi-fetch';
import type { components, paths } from './schema.d.ts';
import { totp } from './totp.ts';

type Tokens = components['schemas']['Tokens'];
type Failure = components['schemas']['Error' | 'FieldError' | 'ServerError'];

const [baseUrl = '', adminEmail = '', adminPassword = ''] = process.argv.slice(2);
const password = 'correct horse battery';
const newPassword = 'another horse battery';
const anonymous = createClient<paths>({ baseUrl });

function authenticated(pair: Tokens) {
  return createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${pair.auth_token}` } });
}

function log(step: string, response: Response, body: object): void {
  console.log(step.padEnd(28), response.status, Object.keys(body).join(' '));
}

/** Return the body of a success. */
function success<Body extends object>(
  step: string,
  result: { data?: Body; error?: Failure; response: Response },
): Body {
  assert.ok(result.data, `${step}: ${JSON.stringify(result.error)}`);
  log(step, result.response, result.data);
  return result.data;
}

/** Return the body of an error. */
function failure<Body extends Failure>(
  step: string,
  result: { data?: unknown; error?: Body; response: Response },
): Body {
  assert.ok(result.error, `${step}: ${JSON.stringify(result.data)}`);
  log(step, result.response, result.error);
  return result.error;
}

async function logIn(email: string, password: string): Promise<Tokens> {
  return success('log in', await anonymous.POST('/auth/login', { body: { email, password } }));
}

async function ownAccount(): Promise<void> {
  const body = { username: 'fetch', email: 'fetch@example.com', password };
  success('ready', await anonymous.GET('/health/ready'));
  let pair: Tokens = success('register', await anonymous.POST('/auth/register', { body }));
  const taken = failure('register again', await anonymous.POST('/auth/register', { body }));
  assert.equal(taken.code, 'user_exists');
  assert.ok('errors' in taken && Object.keys(taken.errors).length > 0);

  const { refresh_token } = pair;
  pair = success('refresh', await anonymous.POST('/auth/refresh', { body: { refresh_token } }));
  const client = authenticated(pair);
  const caller = success('status', await client.GET('/auth/status')).data;
  assert.equal(caller.username, 'fetch');

  const other = authenticated(await logIn(body.email, password));
  const { sessions } = success('sessions', await client.GET('/auth/sessions')).data;
  assert.deepEqual(sessions.map((each) => each.current), [false, true]);
  const path = { session_id: sessions[0]!.id };
  success('end a session', await client.DELETE('/auth/sessions/{session_id}', { params: { path } }));
  assert.equal(failure('its status', await other.GET('/auth/status')).code, 'session_ended');

  const params = { path: { user_id: caller.id } };
  const user = success('user', await client.GET('/users/{user_id}', { params })).data;
  assert.equal(user.created_at, caller.created_at);
  const change = { username: 'fetched', current_password: password };
  const changed = await client.PATCH('/users/{user_id}', { params, body: change });
  assert.equal(success('change the user', changed).data.username, 'fetched');
  const events = success('events', await client.GET('/users/{user_id}/events', { params })).data;
  assert.equal(events.events[0]?.kind, 'user_changed');

  const wrong = { current_password: 'wrong', new_password: newPassword };
  const refused = failure('wrong password', await client.POST('/auth/password', { body: wrong }));
  assert.equal(refused.code, 'wrong_password');
  const right = { current_password: password, new_password: newPassword };
  success('password', await client.POST('/auth/password', { body: right }));
  success('log out', await client.POST('/auth/logout'));
  failure('status', await client.GET('/auth/status'));

  const again = authenticated(await logIn(body.email, newPassword));
  await secondFactor(again, body.email);
  const deletion = { body: { current_password: newPassword } };
  success('delete the account', await again.DELETE('/auth/account', deletion));
}

async function secondFactor(client: typeof anonymous, email: string): Promise<void> {
  const current = { current_password: newPassword };
  const { secret } = success('begin', await client.POST('/auth/totp', { body: current })).data;
  const first = { body: { code: totp(secret) } };
  const confirmed = success('confirm', await client.POST('/auth/totp/confirm', first)).data;
  const [one = '', two = ''] = confirmed.recovery_codes;

  const credentials = { email, password: newPassword };
  const refused = failure('log in', await anonymous.POST('/auth/login', { body: credentials }));
  assert.equal(refused.code, 'mfa_required');
  assert.ok('mfa_token' in refused && refused.mfa_token);
  const second = { body: { mfa_token: refused.mfa_token, code: one } };
  success('second step', await anonymous.POST('/auth/login/mfa', second));
  const state = success('state', await client.GET('/auth/totp')).data;
  assert.deepEqual(state, { enabled: true, recovery_codes_left: 9 });
  const used = await anonymous.POST('/auth/login', { body: { ...credentials, code: one } });
  assert.equal(failure('used code', used).code, 'wrong_code');
  const off = { body: { ...current, code: two } };
  success('turn off', await client.DELETE('/auth/totp', off));
}

async function otherAccounts(): Promise<void> {
  const client = authenticated(await logIn(adminEmail, adminPassword));
  for (const username of ['fetch-1', 'fetch-2']) {
    const body = { username, email: `${username}@example.com`, password };
    success('add', await client.POST('/users', { body }));
  }
  let query: paths['/users']['get']['parameters']['query'] = { limit: 1 };
  let page = success('users', await client.GET('/users', { params: { query } })).data;
  assert.deepEqual(page.users.map((user) => user.username), ['fetch-2']);
  query = { limit: 1, after: page.next ?? undefined };
  page = success('next page', await client.GET('/users', { params: { query } })).data;
  assert.deepEqual(page.users.map((user) => user.username), ['fetch-1']);
  query = { query: 'fetch-' };
  const { users } = success('search', await client.GET('/users', { params: { query } })).data;
  assert.deepEqual(users.map((user) => user.admin), [false, false]);
  query = { limit: 0 };
  const refused = failure('no page', await client.GET('/users', { params: { query } }));
  assert.equal(refused.code, 'invalid_payload');
  for (const { id } of users) {
    const params = { path: { user_id: id } };
    const changed = await client.PATCH('/users/{user_id}', { params, body: { active: false } });
    assert.equal(success('deactivate', changed).data.active, false);
    const body = { code: '123456' }; // the admin has no authenticator, so it is ignored
    const reset = await client.DELETE('/users/{user_id}/totp', { params, body });
    assert.equal(failure('no authenticator', reset).code, 'totp_not_found');
    success('delete', await client.DELETE('/users/{user_id}', { params }));
    const gone = failure('user', await client.GET('/users/{user_id}', { params }));
    assert.equal(gone.code, 'user_not_found');
  }
  success('log out', await client.POST('/auth/logout'));
}

await ownAccount();
await otherAccounts();
