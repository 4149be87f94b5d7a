"""Browsers: the headers of every answer."""

from project.tests.test_contract_answers import AnswersTestCase


class TestEveryAnswer(AnswersTestCase):
    """As it is when nothing is set."""

    def test_safe_headers(self) -> None:
        """No answer is stored, sniffed, framed, embedded or run, or gives away where one was."""
        for name, response in self.every_answer():
            with self.subTest(name):
                for header, value in {
                    "Cache-Control": "no-store",
                    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
                    "Cross-Origin-Resource-Policy": "same-origin",
                    "Referrer-Policy": "no-referrer",
                    "X-Content-Type-Options": "nosniff",
                }.items():
                    self.assertEqual([value], response.headers.getlist(header))
