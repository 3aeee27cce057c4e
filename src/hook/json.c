#include "hook/json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct scanner {
    const char *text;
    uint32_t at, len;
    struct bn_json_token *tokens;
    uint32_t n, cap;
    uint32_t open[BN_JSON_DEPTH_MAX]; /* containers around `at`, outermost first */
    uint32_t depth;
};

static int push(struct scanner *s, enum bn_json_type type, uint32_t start, uint32_t end)
{
    if (s->n == s->cap) {
        uint32_t cap = s->cap ? s->cap * 2 : 1024;
        struct bn_json_token *more = realloc(s->tokens, cap * sizeof(*more));
        if (!more)
            return -ENOMEM;
        s->tokens = more;
        s->cap = cap;
    }
    s->tokens[s->n] = (struct bn_json_token){.type = type, .start = start, .end = end, .next = s->n + 1};
    s->n++;
    return 0;
}

static void skip_space(struct scanner *s)
{
    while (s->at < s->len && strchr(" \t\r\n", s->text[s->at]) && s->text[s->at])
        s->at++;
}

static int hex4(const char *p, const char *end)
{
    int v = 0;
    if (end - p < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        const char *digits = "0123456789abcdef", *d;
        char c = p[i] >= 'A' && p[i] <= 'F' ? (char)(p[i] - 'A' + 'a') : p[i];
        if (!c || !(d = strchr(digits, c)))
            return -1;
        v = v * 16 + (int)(d - digits);
    }
    return v;
}

static int scan_string(struct scanner *s)
{
    uint32_t start = s->at++;
    while (s->at < s->len) {
        unsigned char c = (unsigned char)s->text[s->at++];
        if (c == '"')
            return push(s, BN_JSON_STRING, start, s->at);
        if (c < 0x20)
            return -EBADMSG;
        if (c != '\\')
            continue;
        if (s->at == s->len)
            return -EBADMSG;
        c = (unsigned char)s->text[s->at++];
        if (c == 'u') {
            if (hex4(s->text + s->at, s->text + s->len) < 0)
                return -EBADMSG;
            s->at += 4;
        } else if (!c || !strchr("\"\\/bfnrt", c)) {
            return -EBADMSG;
        }
    }
    return -EBADMSG;
}

static uint32_t digits(const char *p, uint32_t len)
{
    uint32_t n = 0;
    while (n < len && p[n] >= '0' && p[n] <= '9')
        n++;
    return n;
}

static bool is_number(const char *p, uint32_t len)
{
    uint32_t i = len && p[0] == '-', n = digits(p + i, len - i);
    if (n == 0 || (n > 1 && p[i] == '0'))
        return false;
    i += n;
    if (i < len && p[i] == '.') {
        n = digits(p + i + 1, len - i - 1);
        if (n == 0)
            return false;
        i += 1 + n;
    }
    if (i < len && (p[i] == 'e' || p[i] == 'E')) {
        i++;
        if (i < len && (p[i] == '+' || p[i] == '-'))
            i++;
        n = digits(p + i, len - i);
        if (n == 0)
            return false;
        i += n;
    }
    return i == len;
}

static int scan_word(struct scanner *s)
{
    uint32_t start = s->at;
    while (s->at < s->len && s->text[s->at] && !strchr(" \t\r\n,]}:\"[{", s->text[s->at]))
        s->at++;
    const char *p = s->text + start;
    uint32_t len = s->at - start;
    if ((len == 4 && (memcmp(p, "true", 4) == 0 || memcmp(p, "null", 4) == 0)) ||
        (len == 5 && memcmp(p, "false", 5) == 0) || is_number(p, len))
        return push(s, BN_JSON_OTHER, start, s->at);
    return -EBADMSG;
}

/* At `{` or `[`, a string, or a word. */
static int scan_value(struct scanner *s)
{
    char c = s->text[s->at];
    if (c == '"')
        return scan_string(s);
    if (c != '{' && c != '[')
        return scan_word(s);
    if (s->depth == BN_JSON_DEPTH_MAX)
        return -EBADMSG;
    s->open[s->depth++] = s->n;
    return push(s, c == '{' ? BN_JSON_OBJECT : BN_JSON_ARRAY, s->at++, 0);
}

static int scan_key(struct scanner *s)
{
    if (s->at == s->len || s->text[s->at] != '"')
        return -EBADMSG;
    int r = scan_string(s);
    if (r < 0)
        return r;
    skip_space(s);
    if (s->at == s->len || s->text[s->at] != ':')
        return -EBADMSG;
    s->at++;
    skip_space(s);
    return 0;
}

/* Close every container that ends here. False in *more: the outermost value is complete. */
static int after_value(struct scanner *s, bool *more)
{
    while (s->depth) {
        skip_space(s);
        if (s->at == s->len)
            return -EBADMSG;
        struct bn_json_token *t = &s->tokens[s->open[s->depth - 1]];
        char c = s->text[s->at++];
        if (c == ',') {
            skip_space(s);
            *more = true;
            return 0;
        }
        if (c != (t->type == BN_JSON_OBJECT ? '}' : ']'))
            return -EBADMSG;
        t->end = s->at;
        t->next = s->n;
        s->depth--;
    }
    *more = false;
    return 0;
}

/* Just opened: does it end at once? */
static bool empty_container(struct scanner *s, uint32_t before)
{
    if (s->depth == before)
        return false;
    skip_space(s);
    char end = s->tokens[s->open[s->depth - 1]].type == BN_JSON_OBJECT ? '}' : ']';
    return s->at < s->len && s->text[s->at] == end;
}

static int scan(struct scanner *s)
{
    bool more = true;
    skip_space(s);
    while (more) {
        struct bn_json_token *around = s->depth ? &s->tokens[s->open[s->depth - 1]] : NULL;
        int r = 0;
        if (around) {
            around->children++;
            if (around->type == BN_JSON_OBJECT)
                r = scan_key(s);
        }
        if (r == 0 && s->at == s->len)
            r = -EBADMSG;
        uint32_t before = s->depth;
        if (r == 0)
            r = scan_value(s);
        if (r < 0)
            return r;
        /* What was opened is not empty: its first member comes next. */
        if (s->depth > before && !empty_container(s, before))
            continue;
        r = after_value(s, &more);
        if (r < 0)
            return r;
    }
    skip_space(s);
    return s->at == s->len ? 0 : -EBADMSG;
}

int bn_json_scan(const char *text, size_t len, struct bn_json *out)
{
    if (len > BN_JSON_TEXT_MAX)
        return -EFBIG;
    struct scanner s = {.text = text, .len = (uint32_t)len};
    int r = scan(&s);
    if (r < 0) {
        free(s.tokens);
        return r;
    }
    *out = (struct bn_json){text, s.tokens, s.n};
    return 0;
}

void bn_json_free(struct bn_json *j)
{
    free(j->tokens);
    *j = (struct bn_json){0};
}

uint32_t bn_json_first(const struct bn_json *j, uint32_t i)
{
    return i == BN_JSON_NONE || !j->tokens[i].children ? BN_JSON_NONE : i + 1;
}

uint32_t bn_json_member(const struct bn_json *j, uint32_t object, const char *name, enum bn_json_type type)
{
    uint32_t found = BN_JSON_NONE;
    if (object == BN_JSON_NONE || j->tokens[object].type != BN_JSON_OBJECT)
        return BN_JSON_NONE;
    for (uint32_t i = object + 1; i < j->tokens[object].next; i = j->tokens[i + 1].next) {
        if (bn_json_is(j, i, name))
            found = i + 1;
    }
    return found != BN_JSON_NONE && j->tokens[found].type == type ? found : BN_JSON_NONE;
}

static size_t put_utf8(char *out, unsigned c)
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3f));
        out[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3f));
    out[2] = (char)(0x80 | (c >> 6 & 0x3f));
    out[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

/* After "\u": the character, a pair of surrogates joined; *p goes behind it. A lone surrogate is U+FFFD, as for Go. */
static unsigned unescape_u(const char **p, const char *end)
{
    unsigned c = (unsigned)hex4(*p, end);
    *p += 4;
    if (c < 0xd800 || c > 0xdfff)
        return c;
    if (c < 0xdc00 && end - *p >= 6 && (*p)[0] == '\\' && (*p)[1] == 'u') {
        int low = hex4(*p + 2, end);
        if (low >= 0xdc00 && low <= 0xdfff) {
            *p += 6;
            return 0x10000 + ((c - 0xd800) << 10) + ((unsigned)low - 0xdc00);
        }
    }
    return 0xfffd;
}

char *bn_json_string(const struct bn_json *j, uint32_t i)
{
    if (i == BN_JSON_NONE || j->tokens[i].type != BN_JSON_STRING)
        return NULL;
    const char *p = j->text + j->tokens[i].start + 1, *end = j->text + j->tokens[i].end - 1;
    char *out = malloc((size_t)(end - p) + 1), *o = out;
    if (!out)
        return NULL;
    while (p < end) {
        static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
        if (*p != '\\') {
            *o++ = *p++;
            continue;
        }
        char c = p[1];
        p += 2;
        const char *which = strchr(from, c);
        if (c == 'u') {
            unsigned u = unescape_u(&p, end);
            if (u == 0) {
                free(out);
                return NULL;
            }
            o += put_utf8(o, u); /* never longer than its escape */
        } else {
            *o++ = which ? to[which - from] : c;
        }
    }
    *o = 0;
    return out;
}

bool bn_json_is(const struct bn_json *j, uint32_t i, const char *text)
{
    if (i == BN_JSON_NONE || j->tokens[i].type != BN_JSON_STRING)
        return false;
    const char *p = j->text + j->tokens[i].start + 1;
    size_t len = j->tokens[i].end - j->tokens[i].start - 2;
    if (!memchr(p, '\\', len))
        return strlen(text) == len && memcmp(p, text, len) == 0;
    char *value = bn_json_string(j, i);
    bool same = value && strcmp(value, text) == 0;
    free(value);
    return same;
}

char *bn_json_quote(const char *text)
{
    char *out = malloc(strlen(text) * 6 + 3), *o = out;
    if (!out)
        return NULL;
    *o++ = '"';
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if (*p < 0x20) {
            o += sprintf(o, "\\u%04x", *p);
        } else {
            if (*p == '"' || *p == '\\')
                *o++ = '\\';
            *o++ = (char)*p;
        }
    }
    *o++ = '"';
    *o = 0;
    return out;
}
