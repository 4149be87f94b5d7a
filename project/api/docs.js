const KEPT = "authorized";

// Swagger UI keeps the authorization in localStorage, or not at all. sessionStorage keeps it for as
// long as the tab is open, and no other tab reads it.
const keepAuthorization = {
  statePlugins: {
    auth: {
      wrapActions: {
        persistAuthorizationIfNeeded: (_, { authSelectors }) => () =>
          sessionStorage.setItem(KEPT, JSON.stringify(authSelectors.authorized())),
      },
    },
  },
};

window.ui = SwaggerUIBundle({
  url: "docs/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  validatorUrl: null,
  tryItOutEnabled: true,
  plugins: [keepAuthorization],
  onComplete: () => {
    const kept = sessionStorage.getItem(KEPT);
    if (kept) window.ui.authActions.restoreAuthorization({ authorized: JSON.parse(kept) });
  },
});
