/* Log lines on stderr, by EPX_LOG: 0 none, 1 warnings (default), 2 info, 3 debug. One line a call, with the rank. */
#ifndef EPX_BASE_LOG_H
#define EPX_BASE_LOG_H

enum { EPX__LOG_WARN = 1, EPX__LOG_INFO = 2, EPX__LOG_DEBUG = 3 };

void epx__log(int level, const char *format, ...) __attribute__((format(printf, 2, 3)));
void epx__log_set_rank(int rank); /* shown in this thread's lines; -1 is none */

#endif
