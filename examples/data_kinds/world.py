"""Facts about the world: countries, provinces, units, calendar, elements, defined things and places.

Owns: the tables. Does not know: how a fact is asked. Place on the road: read by the Chinese kinds and by the
English text, so that the same facts exist in both languages.
"""

from data_kinds.tables import lines, table

# Chinese name, Chinese capital, Chinese continent, English name, English capital, English continent
COUNTRIES = lines("""
中国|北京|亚洲|China|Beijing|Asia
日本|东京|亚洲|Japan|Tokyo|Asia
韩国|首尔|亚洲|South Korea|Seoul|Asia
泰国|曼谷|亚洲|Thailand|Bangkok|Asia
越南|河内|亚洲|Vietnam|Hanoi|Asia
印度|新德里|亚洲|India|New Delhi|Asia
伊朗|德黑兰|亚洲|Iran|Tehran|Asia
菲律宾|马尼拉|亚洲|the Philippines|Manila|Asia
法国|巴黎|欧洲|France|Paris|Europe
德国|柏林|欧洲|Germany|Berlin|Europe
英国|伦敦|欧洲|the United Kingdom|London|Europe
意大利|罗马|欧洲|Italy|Rome|Europe
西班牙|马德里|欧洲|Spain|Madrid|Europe
葡萄牙|里斯本|欧洲|Portugal|Lisbon|Europe
瑞典|斯德哥尔摩|欧洲|Sweden|Stockholm|Europe
挪威|奥斯陆|欧洲|Norway|Oslo|Europe
芬兰|赫尔辛基|欧洲|Finland|Helsinki|Europe
丹麦|哥本哈根|欧洲|Denmark|Copenhagen|Europe
波兰|华沙|欧洲|Poland|Warsaw|Europe
希腊|雅典|欧洲|Greece|Athens|Europe
埃及|开罗|非洲|Egypt|Cairo|Africa
肯尼亚|内罗毕|非洲|Kenya|Nairobi|Africa
美国|华盛顿|北美洲|the United States|Washington|North America
加拿大|渥太华|北美洲|Canada|Ottawa|North America
古巴|哈瓦那|北美洲|Cuba|Havana|North America
巴西|巴西利亚|南美洲|Brazil|Brasilia|South America
秘鲁|利马|南美洲|Peru|Lima|South America
阿根廷|布宜诺斯艾利斯|南美洲|Argentina|Buenos Aires|South America
澳大利亚|堪培拉|大洋洲|Australia|Canberra|Oceania
新西兰|惠灵顿|大洋洲|New Zealand|Wellington|Oceania
""")

# province, seat of its government
PROVINCES = table("""
河北|石家庄 山西|太原 辽宁|沈阳 吉林|长春 黑龙江|哈尔滨 江苏|南京 浙江|杭州 安徽|合肥 福建|福州 江西|南昌
山东|济南 河南|郑州 湖北|武汉 湖南|长沙 广东|广州 海南|海口 四川|成都 贵州|贵阳 云南|昆明 陕西|西安 甘肃|兰州
青海|西宁
""")

# amount and unit, target unit, number of target units
UNITS = table("""
1米|厘米|100 1分米|厘米|10 1厘米|毫米|10 1千米|米|1000 1千克|克|1000 1公斤|斤|2 1斤|克|500 1斤|两|10 1吨|千克|1000
1升|毫升|1000 1小时|分钟|60 1分钟|秒|60 1天|小时|24 1个星期|天|7 1年|个月|12 1年|个季度|4 1个世纪|年|100 1元|角|10
1角|分|10 半小时|分钟|30 半天|小时|12 半年|个月|6 一刻钟|分钟|15 2米|厘米|200 2小时|分钟|120 2个星期|天|14
2年|个月|24 2元|角|20
""")

WEEKDAYS = "一二三四五六日"
DAY_OFFSETS = {"昨天": -1, "前天": -2, "明天": 1, "后天": 2, "大后天": 3}
MONTHS = ["一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月"]
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
# the seasons of the northern hemisphere, by whole months
SEASONS = ["冬天", "冬天", "春天", "春天", "春天", "夏天", "夏天", "夏天", "秋天", "秋天", "秋天", "冬天"]

FESTIVALS = table("""
元旦|1月1日 妇女节|3月8日 植树节|3月12日 劳动节|5月1日 青年节|5月4日 儿童节|6月1日 建军节|8月1日 教师节|9月10日
国庆节|10月1日 圣诞节|12月25日 春节|农历正月初一 元宵节|农历正月十五 端午节|农历五月初五 七夕节|农历七月初七
中秋节|农历八月十五 重阳节|农历九月初九 腊八节|农历腊月初八
""")

ZODIAC = "鼠牛虎兔龙蛇马羊猴鸡狗猪"

ELEMENTS = table("""
氢|H 氦|He 碳|C 氮|N 氧|O 钠|Na 铝|Al 磷|P 硫|S 氯|Cl 钾|K 钙|Ca 铁|Fe 铜|Cu 锌|Zn
银|Ag 金|Au 汞|Hg 铅|Pb
""")

# what one wants to do, where one goes
PLACES = table("""
看病|医院 借书|图书馆 取钱|银行 坐飞机|机场 坐火车|火车站 看电影|电影院 寄信|邮局 看文物|博物馆 看老虎|动物园
买菜|菜市场 买药|药店 理发|理发店 加油|加油站 健身|健身房 上学|学校 看画展|美术馆 报警|派出所 住宿|酒店
坐船|码头 坐地铁|地铁站 洗衣服|洗衣店 看星星|天文馆
""")

DEFINITIONS = lines("""
医院|医院是给人看病的地方。
学校|学校是学生学习的地方。
图书馆|图书馆是看书和借书的地方。
银行|银行是存钱和取钱的地方。
厨房|厨房是做饭的地方。
医生|医生是给人看病的人。
老师|老师是教学生知识的人。
司机|司机是开车的人。
农民|农民是种地的人。
作家|作家是写书的人。
消防员|消防员是灭火救人的人。
字典|字典是用来查字的书。
日历|日历是用来看日期的东西。
温度计|温度计是用来测量温度的工具。
雨伞|雨伞是用来挡雨的东西。
冰箱|冰箱是用来冷藏食物的电器。
望远镜|望远镜是用来看远处的工具。
显微镜|显微镜是用来看微小物体的工具。
尺子|尺子是用来量长短的工具。
钥匙|钥匙是用来开锁的东西。
月球|月球是地球的卫星。
太阳|太阳是离地球最近的恒星。
地球|地球是我们居住的行星。
彩虹|彩虹是雨后天上的七色光带。
光合作用|光合作用是植物用阳光制造养分的过程。
沙漠|沙漠是雨水很少的地方。
岛屿|岛屿是四面环水的陆地。
火山|火山是会喷出岩浆的山。
饺子|饺子是用面皮包馅做成的食物。
月饼|月饼是中秋节吃的点心。
""")
